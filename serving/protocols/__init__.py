"""Transports and who may use them: HTTP, gRPC, the Open Inference tensors, connections, credentials, admission."""
