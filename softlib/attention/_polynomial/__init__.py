"""The exponential as a polynomial, and the monomials of queries and keys."""
