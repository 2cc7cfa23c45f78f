"""Annotations that others keep in files of their own, joined with their images into tars that encode takes."""
