"""The runtime: an approved release answers, every answer is accounted for, and nothing here loads torch, Prefect or MLflow.

server      sockets, signals, start and drain            app          the HTTP routes, auth and errors
routing     follows the routes, switches releases        grpc_app     the same over gRPC
deployment  one release in service: queue and batches    inference    a request to answers, whatever its protocol
worker      the engine's own process                     journal      what was answered, before it is answered
frames      what the two processes say to each other     segments     journals to Parquet, export, verify
captures    image bytes, by opt-in, erasable             batch        folders and tables through the same engine
    connections bounds and cheap refusals of HTTP            tensors      what the Open Inference Protocol carries
    auth        tokens and their roles                       metrics      Prometheus and the structured log
"""
