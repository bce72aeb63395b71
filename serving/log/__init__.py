"""The prediction log: the journal before the answer, sealed segments, captures and the audit."""
