"""Processes: which rank this is, how ranks start, meet, agree, are signalled and end."""
