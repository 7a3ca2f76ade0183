"""Results, their tables and pictures; results/ beside it holds the files."""
