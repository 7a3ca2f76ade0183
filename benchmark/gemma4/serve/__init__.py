"""Loads of requests, arm beside arm."""
