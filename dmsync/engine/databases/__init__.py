"""SQLite database files compared and merged row by row; knows files, not stores."""
