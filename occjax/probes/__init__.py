"""What is asked of a finished run: other attacks and windows, attackers who know, own images."""
