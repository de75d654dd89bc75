"""The yardstick: a judge that saw real pictures only, statistics with intervals, and a resumable evaluation run.

``python -m unidiffuser.evaluation --model emoji --data FOLDER --out FOLDER`` judges a model; ``python -m
unidiffuser.evaluation.judge --data FOLDER --out FILE`` trains the judge again. Nothing is imported here, so that reading the
metrics costs no model code.
"""
