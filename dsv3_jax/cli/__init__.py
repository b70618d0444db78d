"""The command line: `main` has the table of commands; each is a file with options and a `run`."""
