"""New students made from a teacher: with fewer of its layers, or in a smaller published size of its family with random weights."""
