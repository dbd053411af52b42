"""Protobuf messages for what tests speak, made at run time from the fields that they use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

Schema = Mapping[str, Mapping[str, tuple[int, str]]]
"""Number and type of each field, by message and by field; `[]` is for repeated ones."""

_SCALARS: Final = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
}


def message_classes(package: str, schema: Schema) -> dict[str, type[Message]]:
    """A class for each message of the schema, by its full name."""
    described = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    for message, fields in schema.items():
        in_file = described.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            of_one = kind.removesuffix("[]")
            field = in_file.field.add(name=name, number=number)
            field.label = field.LABEL_OPTIONAL if kind == of_one else field.LABEL_REPEATED
            if of_one in _SCALARS:
                field.type = _SCALARS[of_one]
            else:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{of_one}"
    pool = DescriptorPool()
    pool.AddSerializedFile(described.SerializeToString())
    return message_factory.GetMessageClassesForFiles([described.name], pool)
