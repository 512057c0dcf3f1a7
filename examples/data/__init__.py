"""Data sets shipped with peftfast, installed as `peftfast_data`; each folder says its licence."""
