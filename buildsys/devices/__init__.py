"""Devices: what is pushed where, how it gets there whole, and how it runs.

`definitions` says what a device is; `transport` and its three kinds (`adb`, `ssh`, `local`)
start scripts on it; `remote_folder` is everything that is done to files there; `protocol` deploys;
`preflight` looks before a byte is sent; `running` runs a program. Everything on the device is done
by POSIX shell scripts of a few lines, because a shell is what a phone, a board and a folder share.
"""
