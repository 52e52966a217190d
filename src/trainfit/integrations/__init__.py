"""Thin bridges to other trainers; each module needs its library."""
