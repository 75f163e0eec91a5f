//! `api/openapi.json` says what the server does: every path and method of one is in the other, and every
//! answer is as its schema says. A keyword that is not checked here is not let into the file.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::ROUTES;
use super::limits::{HEADERS, Limits};
use super::tests::{Rig, whole};

const FILE: &str = include_str!("../../api/openapi.json");

fn file() -> Value {
    serde_json::from_str(FILE).unwrap()
}

/// What a `$ref` of the file names.
fn resolve<'a>(file: &'a Value, value: &'a Value) -> &'a Value {
    match value.get("$ref") {
        Some(target) => {
            let pointer = target.as_str().unwrap().strip_prefix('#').unwrap();
            file.pointer(pointer).unwrap_or_else(|| panic!("{pointer} is nowhere"))
        }
        None => value,
    }
}

/// Fails unless `value` is as `schema` says.
fn check(file: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = resolve(file, schema).as_object().unwrap();
    let empty = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    for (keyword, wanted) in schema {
        match keyword.as_str() {
            "description" | "properties" => {}
            "type" => {
                let types = wanted.as_array().cloned().unwrap_or_else(|| vec![wanted.clone()]);
                let is = |name: &Value| match name.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_u64() || value.is_i64(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    other => panic!("{at}: no type {other}"),
                };
                assert!(types.iter().any(is), "{at}: {value} is not {wanted}");
            }
            "enum" => assert!(wanted.as_array().unwrap().contains(value), "{at}: {value}"),
            "minimum" => {
                assert!(value.as_i64().unwrap() >= wanted.as_i64().unwrap(), "{at}: {value}")
            }
            "pattern" => {
                assert_eq!(wanted, "^0x[0-9a-f]+$", "{at}: another pattern has to be checked here");
                let digits = value.as_str().unwrap().strip_prefix("0x").unwrap();
                let digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
                assert!(!digits.is_empty() && digits.chars().all(digit), "{at}: {value}");
            }
            "required" => {
                for name in wanted.as_array().unwrap() {
                    assert!(value.get(name.as_str().unwrap()).is_some(), "{at}: {name} is missing");
                }
            }
            "items" => {
                for item in value.as_array().unwrap() {
                    check(file, wanted, item, &format!("{at}[]"));
                }
            }
            "additionalProperties" => {
                for (name, value) in value.as_object().unwrap() {
                    match (properties.get(name), wanted) {
                        (Some(schema), _) => check(file, schema, value, &format!("{at}.{name}")),
                        (None, Value::Bool(false)) => panic!("{at}.{name} is not described"),
                        (None, schema) => check(file, schema, value, &format!("{at}.{name}")),
                    }
                }
            }
            other => panic!("{at}: {other:?} is not checked"),
        }
    }
    // Properties are checked above.
    assert!(properties.is_empty() || schema.contains_key("additionalProperties"), "{at}");
}

/// The schema of an answer with this status.
fn schema<'a>(file: &'a Value, operation: &'a Value, status: u16) -> &'a Value {
    let response = &operation["responses"][status.to_string()];
    assert!(response.is_object(), "{status} is not described");
    &resolve(file, response)["content"]["application/json"]["schema"]
}

#[test]
fn every_path_and_method_of_the_file_is_routed_and_the_other_way_round() {
    let file = file();
    assert!(file["openapi"].as_str().unwrap().starts_with("3.1."));
    let described: BTreeSet<(String, String)> = file["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let routed: BTreeSet<_> =
        ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
    assert_eq!(described, routed);
    assert_eq!(routed.len(), ROUTES.len(), "no route hides another");
    let operations = || {
        file["paths"].as_object().unwrap().values().flat_map(|it| it.as_object().unwrap().values())
    };
    let ids: BTreeSet<_> = operations().map(|it| it["operationId"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), routed.len());
    for route in ROUTES {
        let operation = &file["paths"][route.path][route.method.to_string().to_lowercase()];
        assert_eq!(operation.get("requestBody").is_some(), route.takes_body, "{}", route.path);
    }
}

#[test]
fn every_answer_is_as_its_schema_says() {
    let file = file();
    let rig = Rig::new(whole());
    for route in ROUTES {
        let operation = &file["paths"][route.path][route.method.to_string().to_lowercase()];
        let path = route.path.replace("{vcpu}", "1");
        let method = route.method.to_string();
        let reply = if route.takes_body {
            let content = &operation["requestBody"]["content"]["application/json"];
            let example = &content["example"];
            check(&file, &content["schema"], example, &path);
            rig.give(&method, &path, &example.to_string())
        } else {
            rig.ask(&method, &path)
        };
        assert_eq!(reply.status, 200, "{}", reply.json);
        check(&file, schema(&file, operation, 200), &reply.json, &path);
        let mut wrong = vec![("DELETE", path.clone(), 405)];
        if route.path.contains("{vcpu}") {
            wrong.push(("GET", route.path.replace("{vcpu}", "7"), 404));
            wrong.push(("GET", route.path.replace("{vcpu}", "x"), 400));
        }
        for (method, path, status) in wrong {
            let reply = rig.ask(method, &path);
            assert_eq!(reply.status, status, "{method} {path}");
            check(&file, schema(&file, operation, status), &reply.json, &path);
        }
    }
    let error = &file["components"]["schemas"]["Error"];
    check(&file, error, &rig.ask("GET", "/").json, "/");
}

#[test]
fn every_kind_of_error_is_in_the_file_with_its_status_and_no_other() {
    use super::{ApiError, Method};
    use crate::gdb::HoldError;
    use std::time::Duration;
    let file = file();
    let errors = [
        ApiError::Malformed("x".into()),
        ApiError::UnexpectedBody { method: Method::Get, path: "/", len: 1 },
        ApiError::NotANumber(String::new()),
        ApiError::BadBody { method: Method::Put, path: "/", error: String::new() },
        ApiError::BalloonTooLarge { target: 2, memory: 1 },
        ApiError::NoBalloon,
        ApiError::Forbidden(1),
        ApiError::NotFound(String::new()),
        ApiError::Hold(HoldError::NoSuchVcpu { vcpu: 1, vcpus: 1 }),
        ApiError::Method { path: "/", allowed: vec![Method::Get] },
        ApiError::Timeout(Duration::ZERO),
        ApiError::Body { limit: 1, len: 2 },
        ApiError::Head { bytes: 1, headers: 1 },
        ApiError::Kvm(hv_core::Error::new(hv_core::Ioctl::GetRegs, hv_core::Errno::EIO)),
        ApiError::Internal,
        ApiError::TransferEncoding,
        ApiError::Connections(1),
        ApiError::Hold(HoldError::Busy { vcpu: 1, limit: Duration::ZERO }),
        ApiError::Hold(HoldError::Stopping),
        ApiError::Version,
    ];
    let codes =
        &file["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"];
    let described: BTreeSet<_> =
        codes["enum"].as_array().unwrap().iter().map(|code| code.as_str().unwrap()).collect();
    assert_eq!(described, errors.iter().map(|error| error.kind().1).collect());
    for error in errors {
        let (status, code) = error.kind();
        let mut described = false;
        for operation in file["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|it| it.as_object().unwrap().values())
        {
            let response = &operation["responses"][status.to_string()];
            if response.is_object() {
                let text = resolve(&file, response)["description"].as_str().unwrap().to_owned();
                assert!(text.contains(code), "{status} does not tell of {code}: {text}");
                described = true;
            }
        }
        assert!(described, "{status} {code} is nowhere");
    }
}

#[test]
fn the_limits_in_the_file_are_those_there_are() {
    let file = file();
    let text = |name: &str| {
        file["components"]["responses"][name]["description"].as_str().unwrap().to_owned()
    };
    let limits = Limits::default();
    assert!(text("Timeout").contains(&format!("after {} seconds", limits.transfer.as_secs())));
    assert!(text("BodyTooLarge").contains(&format!("than {} bytes", limits.body)));
    let head =
        format!("than {} bytes before the body, or more than {HEADERS} headers", limits.head);
    assert!(text("HeadTooLarge").contains(&head));
    assert!(text("Unavailable").contains(&format!("{} are open", limits.connections)));
}
