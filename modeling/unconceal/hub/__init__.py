"""Towards the Hub: conversion of published checkpoints."""
