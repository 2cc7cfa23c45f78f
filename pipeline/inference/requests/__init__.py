"""What `latentmill sample` may be asked for: a file for each task, from words and files to members of a batch."""
