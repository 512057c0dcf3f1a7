"""Data sets that ship with peftfast, installed as `peftfast_data`; each folder holds its licence."""
