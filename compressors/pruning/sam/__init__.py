"""What SlimSAM is made of: scores, choice, cuts and the aligning of a Segment Anything encoder."""
