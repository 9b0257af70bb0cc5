"""Programs that run in the Python that has onnxruntime-qnn; they import nothing of qbuild's.

onnx and onnxruntime are imported in functions alone, so that qbuild can import the programs too:
that makes their code part of the rule's key.
"""
