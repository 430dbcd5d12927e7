"""Recipes: a result as a short script that loads, quantizes and generates exactly so, without lbi where it can."""
