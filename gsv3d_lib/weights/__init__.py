"""Checkpoint folders: ours, and the published weights of SV3D."""
