"""What the rules for Sophgo's TPUs share: options, the model as the compiler wants it, running the
compiler and its simulator."""
