"""Connections to training libraries; each module imports its library, none is imported unasked."""
