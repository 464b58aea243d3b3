"""Training a model that is compressed already to do again what the original does.

What was decided stays: of 2:4 weights the mask, of quantised ones the codes. `compressed.py` and `scaled.py` are the two linear
layers, `student.py` puts them into a model and takes the weights out again, `losses.py` compares with the teacher, `loop.py`
steps, saves and resumes, `parallel.py` spreads it over processes. Read them in this order.
"""
