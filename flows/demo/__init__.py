"""The demo: a loop that closes on real digits while one watches."""
