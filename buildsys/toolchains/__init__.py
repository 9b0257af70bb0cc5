"""Toolchains: which are there, what tells one version from another, and how to get those that
are not.

One YAML file per toolchain in `toolchains/` (the project's own first, then qbuild's):

    doc: Mobilint's compiler
    unlocks: [mblt, mxq]             rules that need it
    get: pip install qbcompiler      what to do where it is missing
    versions: {from: "0.11", below: "2"}
    find:                            the first place that has it counts
      - python: qbcompiler           a distribution in qbuild's own Python ...
        interpreter: QBUILD_MOBILINT_PYTHON   ... or in the one that this variable names
        with: [torch]                others there that decide the result
      - variable: QNN_SDK_ROOT       a folder that a variable names ...
        file: sdk.yaml               ... in which this file must be; its bytes tell versions apart

Looking executes nothing: distributions are told by the names of their folders, SDKs by a file.
"""
