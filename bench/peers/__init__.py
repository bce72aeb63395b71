"""The servers that `make bench NAME=serving` compares with, each with the settings its documentation recommends.

All of them decode with the same function and run the same engine file on the same number of threads, `fastapi_torch` apart:
it is what people write first, and runs the torch model that the engine was built from. Each is started as
`python -m bench.peers.NAME RELEASE PORT SETTING` and answers a posted JPEG with JSON.
"""
