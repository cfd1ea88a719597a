"""What makes a model faster and never changes its numbers: attention, blocks, a CPU's operators."""
