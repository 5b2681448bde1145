"""What people type and read: help, sentences for settings that cannot be, and names that keys have elsewhere."""
