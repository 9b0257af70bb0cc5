"""Toolchains: which are there, what tells one version from another, and how to get those that
are not.

One YAML file per toolchain in `toolchains/` (the project's own first, then qbuild's):

    doc: Mobilint's compiler
    unlocks: [mblt, mxq]             rules that need it
    get: pip install qbcompiler      what to do where it is missing
    page: https://...                and where to read on
    versions: {from: "0.11", below: "2"}
    find:                            the first place that has it counts
      - python: qbcompiler           a distribution in qbuild's own Python ...
        interpreter: QBUILD_MOBILINT_PYTHON   ... or in the one that this variable names
        with: [torch]                others there that decide the result
      - python: onnxruntime-qnn
        installed: true              in the environment that `qbuild toolchain install` made
      - variable: QNN_SDK_ROOT       a folder that a variable names ...
        file: sdk.yaml               ... in which this file must be; its bytes tell versions apart
        version: [{file: sdk.yaml, pattern: 'version: (.*)'}, {folder: '([0-9.]+)$'}]
        names: tools/*               the names in this folder tell versions apart too
      - {installed: true, file: bin/tool}     a folder that an installer of its own has filled
      - program: [clang-22, clang-19]         a program on PATH whose name ends in its version
    install:                         where public registries have it: pip requirements, or
      requirements: [onnxruntime-qnn==2.7.0]
      python: {from: "3.11"}         which Python the environment is made with
      imports: [onnxruntime_qnn]     tried before the environment counts
    install: {installer: buildsys.toolchains.installers.NAME, options: {...}}      a module

Looking executes nothing: distributions are told by the names of their folders, SDKs by a file.
Where a step names several, `qnn-sdk+hexagon-sdk`, all must be there.
"""
