"""Training with a 2:4 mask that cannot be lost: only the kept weights exist as parameters.

`compressed.py` is the linear layer, `student.py` puts it into a model and takes the weights out again, `losses.py` compares
with the teacher, `loop.py` steps, saves and resumes, `parallel.py` spreads it over processes. Read them in this order.
"""
