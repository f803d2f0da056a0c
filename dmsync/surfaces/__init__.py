"""What people and programs touch: prints, parses, exits."""
