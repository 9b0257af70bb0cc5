"""What the rules for Qualcomm's Hexagon share: archs, programs, the layout of an op package."""
