"""The command: `reshard`. One module per subcommand; what they share is in `output`."""
