"""Stored rows as a teacher would be given them, and what it says now beside what is stored."""
