"""Public checkpoints: conversion, and comparison with `transformers`."""
