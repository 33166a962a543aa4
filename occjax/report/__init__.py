"""From numbers to pages, tables and pictures: bytes out, no file read or written."""
