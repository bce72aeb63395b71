"""What answers out of a bundle where there is no visionloop: a program, and a file for each target and task that it can run.

These files need Python's own library, NumPy, Pillow and their runtime, and are copied into bundles as they are.
A target or a task without a file here cannot leave in a bundle.
"""
