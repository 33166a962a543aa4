"""The paper as a program: stages, and what they leave in a work directory."""
