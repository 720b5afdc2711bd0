"""What an honest-but-curious server can rebuild from the messages it receives."""
