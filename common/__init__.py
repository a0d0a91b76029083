"""What every script stands on: this process, its command line, its errors, files written whole.

`process` decides device, precision and process group, `stopping` when all ranks end; `flags` how
flags are declared, with the `names` that need no torch and the `labels` of classes; `errors` which
errors become one line, `quiet` which lines of other libraries none; `files` how a file gets its
name. `arrays` reads the head of a .npy, `network` asks whether a server answers, and `pictures`
puts images side by side. Imports nothing of ours.
"""
