"""What every script stands on: this process, its command line, its errors, files written whole.

`process` decides device, precision and process group; `flags` how flags are declared; `errors`
which errors become one line; `files` how a file gets its name. Imports nothing of ours.
"""
