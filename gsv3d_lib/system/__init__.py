"""What every command and file needs: errors, paths, options, the machine's state."""
