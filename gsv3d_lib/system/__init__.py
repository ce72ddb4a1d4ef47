"""What every command and file needs: errors, paths, the manner of commands, the state
of the machine.
"""
