"""What people look at: the terminal and the HTML file, both made from the store."""
