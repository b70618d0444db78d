"""The command line: `main` has the table of commands, and each command is a file with its options and a `run`."""
