"""A made data set with known answers: painted scenes, their captions, and where each named object lies."""
