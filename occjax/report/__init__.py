"""From numbers to pages, tables and pictures: bytes out; only `pictures.save` writes a file."""
