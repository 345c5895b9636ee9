"""The command line: `app` holds the commands, a module each for those of more than a screen, `options` what they share."""
