"""The runtime: an approved release answers, every answer is accounted for, and nothing here loads torch, Prefect or MLflow.

server      sockets, signals, start and drain            batch       folders and tables through the same engine
routing     follows the routes, switches releases        inference   a request to answers, whatever its protocol
metrics     Prometheus and the structured log

engines/    deployment   one release in service: queue and batches
            worker       the engine's own process, started at `process`; `frames` is what is said to it
protocols/  http, grpc   the routes, errors and answers; `tensors` is what the Open Inference Protocol carries
            connections  bounds and cheap refusals of HTTP; `access` says who may ask, `auth` keeps the tokens
log/        journal      what was answered, before it is answered
            sealing      journals to Parquet; `audit` exports and verifies, `captures` keeps images, by opt-in
            sending      kept images to the address of a team; `background` runs both beside the answers
"""
