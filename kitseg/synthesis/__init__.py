"""Synthetic patients: real bodies with other lesions, contrast phases, anatomy and scanners (pure functions)."""
